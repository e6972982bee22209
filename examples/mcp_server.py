"""A server of the Model Context Protocol with one tool, which speaks through stdin and stdout.

`llamaindex_mcp_agent.py` starts it.
"""

from mcp.server.mcpserver import MCPServer

server = MCPServer("harbour")


@server.tool()
def tide(harbour: str, hour: int) -> str:
    """The height of the tide in a harbour at an hour of the day."""
    return f"At {hour} o'clock the tide in {harbour} is 3 metres high."


if __name__ == "__main__":
    server.run()
