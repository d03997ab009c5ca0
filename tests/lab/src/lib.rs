//! Network namespaces as a test network: LANs, NAT, firewalls, cuts.
