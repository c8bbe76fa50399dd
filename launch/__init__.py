"""Start it: the `headway` command, and what starts trainers on machines."""
