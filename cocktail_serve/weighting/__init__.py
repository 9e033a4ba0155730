"""From what each model loses on the examples to how much of it goes into the mixture."""
