"""From a packed `Program` to C for microcontrollers: its steps, its code, what it takes. No torch."""
