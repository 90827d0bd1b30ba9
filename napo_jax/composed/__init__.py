"""Records of several pictures made of records of one, and the answers that look at the wrong one."""
