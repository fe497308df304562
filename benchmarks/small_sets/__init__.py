"""How accurate is a fine-tuning run on a small set of photographs, here and with other programs? See __main__.py."""
