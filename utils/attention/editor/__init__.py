"""The page on which a person edits attention."""
