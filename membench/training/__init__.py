"""One run: build model and optimizer, train, evaluate, meter."""
