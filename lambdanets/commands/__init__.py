"""The commands, one a file: its arguments (`parser`), and one call each (`run`), which alone imports torch."""
