"""The data analyst: reads sealed archives, restores images in memory, trains and evaluates."""
