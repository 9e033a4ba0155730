"""How well a model predicts examples: the losses that merging weights are made of."""
