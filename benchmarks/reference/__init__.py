"""Plain implementations of published procedures, written from their equations: obvious rather than fast."""
