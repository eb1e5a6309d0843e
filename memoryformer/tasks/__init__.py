"""Tasks that are generated here, with one small trainer."""
