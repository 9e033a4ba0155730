"""Recipes that share a batch: a request brings its row of coefficients, and nothing is merged.

Mixing is linear, and so is what a LoRA adapter adds to a layer: `y = x W + sum_i c_i * (x A_i) B_i`. The factors of all
experts of the pool stay beside the base, and a recipe is the coefficients `c`.

- `row`: what a request says of its recipe, and the row of coefficients that it is; in the API server.
- `factors`: the experts' factors, read and checked.
- `layers`: where in vLLM's model each belongs, and how it is added there.
- `step`: the rows of a step, one for each of its tokens.
- `kernel`: the product.
"""
