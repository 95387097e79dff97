"""How a reduction is decided; nothing is changed here."""
