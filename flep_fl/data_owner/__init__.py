"""The data owner: where images come from, who gets which, and the archives that leave."""
