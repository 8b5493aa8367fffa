"""Calls and loops whose maps would be wrong: refused in the first pass, or without a record and with a warning."""

import contextlib

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPanoramaPipeline, StableDiffusionPipeline
from helpers import generate
from peft import LoraConfig
from tiny import of_components

import daamlib


class Custom(StableDiffusionPipeline):
    """A pipeline of one image whose `denoise(number, t, latents, text)` makes a pass and returns the noise."""

    def __call__(self, prompt, denoise, prompt_embeds=None):
        text, _ = self.encode_prompt(prompt, self.device, 1, False, prompt_embeds=prompt_embeds)
        self.scheduler.set_timesteps(4)
        latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
        for number, t in enumerate(self.scheduler.timesteps):
            latents = latents.roll(1, -1) if number else latents
            denoise(self, number, t, latents, text)
        self.maybe_free_model_hooks()


def step(pipe, number, t, latents, text):
    with torch.no_grad():
        return pipe.unet(latents, t, encoder_hidden_states=text).sample


def grows(pipe, number, t, latents, text):
    step(pipe, number, t, latents if number < 2 else latents.repeat(1, 1, 2, 2), text)


def turns(pipe, number, t, latents, text):
    step(pipe, number, t, latents if number < 2 else latents.transpose(2, 3), text)


def only_gradients(pipe, number, t, latents, text):
    if number < 2:
        pipe.unet(latents.requires_grad_(), t, encoder_hidden_states=text)
    else:
        step(pipe, number, t, latents.detach(), text)


@pytest.mark.parametrize("denoise, match", [(grows, "followed"), (turns, "followed"), (only_gradients, "gradients")])
def test_what_shows_later_costs_the_record_alone(sd1_pipe, denoise, match):
    pipe = of_components(Custom, sd1_pipe)
    with daamlib.trace(pipe) as trace, pytest.warns(UserWarning, match=match):
        pipe("a car", denoise)
    assert len(trace) == 0
    with daamlib.trace(pipe) as trace:  # the same loop without it
        pipe("a car", step)
    assert [len(record.timesteps) for record in trace] == [4]


def test_latents_that_gradients_were_computed_of_before_are_those_of_a_step(sd1_pipe):
    """As in Attend-and-Excite: a pass with gradients, then one without, of the same leaf."""

    def both(pipe, number, t, latents, text):
        pipe.unet(latents.requires_grad_(), t, encoder_hidden_states=text)
        step(pipe, number, t, latents, text)

    pipe = of_components(Custom, sd1_pipe)
    with daamlib.trace(pipe) as trace:
        pipe("a car", both)
    with daamlib.trace(pipe) as plain:
        pipe("a car", step)
    assert torch.equal(trace[0].daam().values, plain[0].daam().values)


def test_embeddings_are_not_named_by_a_prompt_that_they_replace(sd1_pipe):
    pipe = of_components(Custom, sd1_pipe)
    tree, _ = pipe.encode_prompt("a tree", pipe.device, 1, False)
    with daamlib.trace(pipe) as trace:
        pipe("a car", step, prompt_embeds=tree)
    assert trace[0].prompt is None


def test_positions_that_are_merged_from_a_later_step_on(fresh):
    pipe, passes = fresh("sd1"), []
    attn = pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2

    def merge(module, args):
        passes.append(1)
        return (args[0][:, ::2],) if len(passes) > 1 else None

    attn.register_forward_pre_hook(merge)
    attn.register_forward_hook(lambda *to: to[2].repeat_interleave(2, 1) if len(passes) > 1 else None)
    with daamlib.trace(pipe) as trace, pytest.warns(UserWarning, match="tiles or are merged"):
        generate(pipe, num_inference_steps=3)
    assert len(trace) == 0


def test_a_denoiser_that_is_replaced_inside_the_with(fresh):
    pipe, other = fresh("sd1"), fresh("sd1")
    with daamlib.trace(pipe), pytest.raises(ValueError, match="replaced inside the `with`"):
        pipe.unet = other.unet
        generate(pipe)


def test_a_cache_that_is_put_on_inside_the_with(fresh):
    pipe = fresh("sd1")
    config = diffusers.PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    with daamlib.trace(pipe), pytest.raises(ValueError, match="caches that skip or re-use"):
        diffusers.apply_pyramid_attention_broadcast(pipe.unet, config)
        generate(pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_a_lora_whose_scale_a_callback_changes_a_little(fresh, dtype, scale):
    pipe = fresh("sd1").to(dtype)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))

    def change(pipe, number, timestep, tensors):
        pipe.unet.set_adapters(["default"], [scale])
        return {}

    changes = pytest.warns(UserWarning, match="changed between passes") if scale < 1 else contextlib.nullcontext()
    with daamlib.trace(pipe) as trace, changes:
        generate(pipe, callback_on_step_end=change)
    assert len(trace) == (scale == 1)


class Rolled(torch.nn.Module):
    """Has the name of an IP-Adapter's part, and gives each token the attention of the one before it."""

    to_k_ip = None

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(to(encoder_hidden_states)) for to in (attn.to_k, attn.to_v))
        probabilities = attn.get_attention_scores(query, key).roll(1, -1)
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


def test_a_processor_with_the_name_of_an_ip_adapter_is_compared(fresh):
    pipe = fresh("sd1")
    processors = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: Rolled() if "attn2" in name else of for name, of in processors.items()})
    with pytest.raises(ValueError, match="its processor Rolled"), daamlib.trace(pipe):
        generate(pipe)


def test_tiles_of_two_prompts_pair_other_latents(sd1_pipe):
    pipe = of_components(StableDiffusionPanoramaPipeline, sd1_pipe)
    side = 64 * pipe.vae_scale_factor  # of one tile
    with pytest.raises(ValueError, match="other latents than the negative"), daamlib.trace(pipe):
        generate(pipe, ["a car", "a tree"], height=side, width=side)


def test_a_call_that_is_aborted_after_its_last_step_leaves_no_record(sd1_pipe):
    def stop(pipe, number, timestep, tensors):
        if number == 1:
            raise KeyboardInterrupt
        return {}

    with daamlib.trace(sd1_pipe) as trace, pytest.warns(UserWarning, match="did not end"):
        with pytest.raises(KeyboardInterrupt):
            generate(sd1_pipe, "a car", callback_on_step_end=stop)
        generate(sd1_pipe, "a tree")
    assert [record.prompt for record in trace] == ["a tree"]


def test_an_inversion_that_a_pipeline_makes_is_no_image(sd1_pipe):
    """Its scheduler is another one, whose noise levels rise."""

    def invert(pipe, number, t, latents, text):
        step(pipe, number, 100 * number + 50, latents, text)

    pipe = of_components(Custom, sd1_pipe)
    with pytest.raises(ValueError, match="higher noise level, as in an inversion"), daamlib.trace(pipe):
        pipe("a car", invert)
