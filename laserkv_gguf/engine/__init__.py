"""The model, its context and who may use them."""
