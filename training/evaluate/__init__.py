"""What a model is worth: pictures, numbers and a report."""
