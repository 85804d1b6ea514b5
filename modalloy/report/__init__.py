"""What is written for people: the model card."""
