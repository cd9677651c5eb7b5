"""How many replicas should serve, by the policy of a HorizontalPodAutoscaler."""
