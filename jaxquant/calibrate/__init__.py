"""What is known about a layer: `moments` of its inputs, and the `text` they come from."""
