"""One module per family of routes; each reads the request, asks the layer below, and shapes the answer."""
