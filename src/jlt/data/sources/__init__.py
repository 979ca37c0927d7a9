"""Image sources: numbered, labelled images as they lie, with a stable class list; nothing is converted here."""
