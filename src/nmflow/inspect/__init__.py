"""What a network and its training are: audits, costs, gradient noise, mask flips."""
