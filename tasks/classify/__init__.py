"""Classification of the user's own texts."""
