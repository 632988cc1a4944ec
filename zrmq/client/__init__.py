"""Behind producer and consumer: links, routes, the buffer of what is to be sent, the queues being read."""
