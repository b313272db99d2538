"""Which weights of a model are cut into groups: roles by name, weights by module, the plan."""
