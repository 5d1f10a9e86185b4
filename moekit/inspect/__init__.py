"""A model and text in; tables and pictures of what its experts do out."""
