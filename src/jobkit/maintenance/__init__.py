"""What is done now and then: lost jobs rescued, old ones pruned, stored files audited."""
