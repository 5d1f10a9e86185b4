"""Fast paths. Nobody but `ops` imports them, and each can say why it cannot run on given tensors."""
