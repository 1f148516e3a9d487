"""From a packed `Program` to C for microcontrollers: steps, code, emulated cores. No torch."""
