"""The judge of the digit world: reads digits, colours and motion from pixels alone, and reports what it finds."""
