"""The judge of the digit world: digits, colours and motion read from pixels alone, and reports."""
