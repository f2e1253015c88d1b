"""Cold diffusion (Bansal et al., arXiv:2208.09392): what one run computes.

Data flows one way: config -> data -> degradation -> model -> training -> checkpoint -> evaluation
-> tracking. Importing this package imports nothing heavy; take what you need from its modules.
"""

__version__ = "0.1.0"
