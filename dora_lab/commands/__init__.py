"""The command line, a room for each kind of work: run, results, inspect, models, plot.

A command reads its arguments, calls one wing and prints; what it says can be had from Python as well.
"""
