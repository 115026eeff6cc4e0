"""The commands of `laai`, one module each: `add` gives a parser its flags; the command returns a Report, or
None in all launched processes but the first.
"""
