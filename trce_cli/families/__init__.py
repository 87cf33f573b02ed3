"""What a model is: one folder a family, and the parts that families share."""
