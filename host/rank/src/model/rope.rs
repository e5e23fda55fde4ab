//! Rotary position embeddings in the Hugging Face layout (the two halves of a head rotate against each other).

use host::hf::{ModelConfig, RopeScaling};
use tch::{Device, Kind, Tensor};

/// Frequencies of a model; angles are made per batch from its positions.
pub struct Rope {
    inverse_frequencies: Tensor, // [H/2], f32
}

impl Rope {
    /// `f_i = theta^(-2i/H)`, stretched as Llama 3.1 does where the config says so. In f32 throughout, as the reference
    /// implementations compute it.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        let head_dim = config.head_dim;
        let exponents = Tensor::arange_start_step(0, head_dim, 2, (Kind::Float, Device::Cpu)) / head_dim as f64;
        let powers = Tensor::from(config.rope_theta as f32).pow(&exponents);
        let plain = powers.reciprocal();
        let frequencies = match &config.rope_scaling {
            Some(scaling) => stretch(&plain, scaling),
            None => plain,
        };
        Self { inverse_frequencies: frequencies.to_kind(Kind::Float).to_device(device) }
    }

    /// Cosines and sines for `positions` `[T]`: two f32 tensors `[T, H/2]`.
    pub fn angles(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let angles = positions.to_kind(Kind::Float).unsqueeze(1) * self.inverse_frequencies.unsqueeze(0);
        (angles.cos(), angles.sin())
    }
}

/// Long wavelengths are divided by `factor`, short ones kept, those between interpolated (parity §3.2).
fn stretch(frequencies: &Tensor, scaling: &RopeScaling) -> Tensor {
    let context = scaling.original_max_position_embeddings;
    let wavelengths = frequencies.reciprocal() * (2.0 * std::f64::consts::PI);
    let slowed = frequencies / scaling.factor;
    let span = scaling.high_freq_factor - scaling.low_freq_factor;
    let blend = (wavelengths.reciprocal() * context - scaling.low_freq_factor) / span;
    let blended = (1.0 - &blend) * &slowed + &blend * frequencies;
    let long = wavelengths.gt(context / scaling.low_freq_factor);
    let short = wavelengths.lt(context / scaling.high_freq_factor);
    let middle = frequencies.where_self(&short, &blended);
    slowed.where_self(&long, &middle)
}
