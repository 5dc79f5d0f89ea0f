"""The device kit: checks every kernel on the accelerator it finds, times it against floors and rivals, tunes tiles."""
