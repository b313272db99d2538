"""nmflow inside other people's trainers; each file imports its framework only when it is used."""
