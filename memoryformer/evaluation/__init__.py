"""What a model is worth: its loss, and how it uses its tables and slots."""
