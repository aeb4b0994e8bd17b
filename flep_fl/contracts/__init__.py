"""Records, ports and errors that every room shares; imports the standard library and numpy only."""
