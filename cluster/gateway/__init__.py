"""The gateway: hospitals that are trust domains of their own take part over mutual TLS. See docs/gateway.md."""
