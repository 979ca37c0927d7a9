"""The bundled networks: their files, and what they were trained and measured on."""
