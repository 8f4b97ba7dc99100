"""Maintenance: lost jobs are rescued, old ones pruned, stored files audited."""
