"""DALL·E Mini and its relatives: reading from every layout, assembly, writing."""
