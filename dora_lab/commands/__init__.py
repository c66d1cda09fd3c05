"""The command line, a room for each kind of work: run (own: a model of anybody's), results, judge,
inspect, models, plot; app is what they share.

`ending` decides how a command ends, `show` how a table looks.

A command reads its arguments, calls one wing and prints; what it says can be had from Python as well.
"""
