"""FLEP: federated learning whose images and whose models both stay private."""
