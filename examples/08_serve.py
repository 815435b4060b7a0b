"""`transformers serve` for a MambaFormer: the OpenAI API, with an expert vector chosen by each request.

    pip install "mambaformer[serve]"
    python examples/08_serve.py FOLDER --trust-remote-code --port 8000

All options are those of `transformers serve`. A request names an expert vector of the folder in its field
`generation_config`, which is a string of JSON. `client.chat` needs a tokenizer with a chat template, others do not:

    client.completions.create(..., extra_body={"generation_config": '{"expert_vector": "python"}'})

The command finds a model's class by name in the library, where a class that a folder brings along is not. This script
registers the Auto class under that name, which loads the folder's own code; it does not import `mambaformer`.
"""

import sys

import transformers
from fastapi.responses import JSONResponse
from transformers.cli.serving import server
from transformers.cli.transformers import main

library_server = server.build_server


def build_server(manager, *args, **kwargs):
    """The library's server, which tells a client about its own mistakes and lists the model that it serves."""
    app = library_server(manager, *args, **kwargs)

    @app.exception_handler(TypeError)  # a vector or a schedule of another type, or JSON that is no string
    @app.exception_handler(ValueError)
    async def refuse(_request, error):
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    if not hasattr(manager, "list_models") and manager.force_model is not None:  # before 5.24: only the Hub's cache
        listed = {"id": manager.force_model, "object": "model", "created": 0, "owned_by": "local"}
        manager.get_gen_models = lambda: [listed]
    return app


if __name__ == "__main__":
    transformers.MambaFormerForCausalLM = transformers.AutoModelForCausalLM
    server.build_server = build_server
    sys.argv.insert(1, "serve")
    main()
