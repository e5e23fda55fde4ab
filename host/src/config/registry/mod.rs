//! The closed vocabulary: every component and every key a config may use, and what becomes of each.
//!
//! Adding to it is adding a row to [`components`] or [`keys`]. A key is honoured, satisfied (it cannot change a result
//! here, and a notice says so), fixed (one value is what we do; others are refused) or refused with a reason. `resolve`
//! reads the honoured ones; a test compares the two, so that nothing is accepted and then ignored. Nothing outside these
//! tables can be named in a config: a dotted path is an alias of a row and is never imported.

pub mod components;
pub mod keys;
mod not_yet;

use super::suggest;
use crate::error::quoted;
pub use components::model_families;
pub use not_yet::{NOT_YET, NotYet, not_yet};

/// What a component is for; a section of the config takes one role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Model,
    Tokenizer,
    Template,
    Dataset,
    Checkpointer,
    Optimizer,
    LrScheduler,
    Loss,
    DistillationLoss,
    MetricLogger,
    Profiler,
    Quantizer,
}

impl Role {
    pub fn noun(self) -> &'static str {
        match self {
            Role::Model => "model",
            Role::Tokenizer => "tokenizer",
            Role::Template => "template",
            Role::Dataset => "data set",
            Role::Checkpointer => "checkpointer",
            Role::Optimizer => "optimizer",
            Role::LrScheduler => "schedule",
            Role::Loss => "loss",
            Role::DistillationLoss => "distillation loss",
            Role::MetricLogger => "metric logger",
            Role::Profiler => "profiler",
            Role::Quantizer => "quantizer",
        }
    }

    /// The noun with its article.
    pub fn a_noun(self) -> String {
        let article = if self == Role::Optimizer { "an" } else { "a" };
        format!("{article} {}", self.noun())
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Type {
    Bool,
    /// A whole number in `min..=max`.
    Count {
        min: u64,
        max: u64,
    },
    /// A finite number in `min..=max`.
    Number {
        min: f64,
        max: f64,
    },
    Text,
    OneOf(&'static [&'static str]),
    Texts,
    TextsOf(&'static [&'static str]),
    Section(&'static [Key]),
    Component(Role),
    /// One component, or a list of them.
    Components(Role),
    /// A template's name or path, `{_component_: either, …settings}`, or a role's texts.
    Template,
    /// Any scalar, list or mapping; whoever reads it checks it.
    Any,
    /// The same with finite numbers, for guests.
    Settings,
}

impl Type {
    /// Says what is needed, for `… must be …`.
    pub fn expected(&self) -> String {
        match self {
            Type::Bool => "`True` or `False`".into(),
            Type::Count { min, max: keys::LARGEST.. } => format!("a whole number, at least {min}"),
            Type::Count { min, max } => format!("a whole number from {min} to {max}"),
            Type::Number { min, max } if max.is_infinite() && min.is_infinite() => "a number".into(),
            Type::Number { min, max } if max.is_infinite() => format!("a number, at least {min}"),
            Type::Number { min, max } => format!("a number from {min} to {max}"),
            Type::Text => "a text".into(),
            Type::OneOf(names) => format!("one of {}", quoted(*names)),
            Type::Texts => "a list of texts".into(),
            Type::TextsOf(names) => format!("a list of {}", quoted(*names)),
            Type::Section(_) => "a section of keys".into(),
            Type::Component(role) => format!("a section with `_component_: {}`", role.noun()),
            Type::Components(role) => format!("a section with `_component_: {}`, or a list of such", role.noun()),
            Type::Template => "a template's name or path, or a section with `_component_: template`".into(),
            Type::Any | Type::Settings => "a value".into(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Class {
    Honoured,
    /// Honoured by the recipes that ask for it; with another one it is an error.
    OfRecipe,
    /// Any value of the type is fine, for this reason; other than the default it earns a notice.
    Satisfied(&'static str),
    /// As satisfied, with nothing worth saying.
    Quiet(&'static str),
    /// The default is what we do; any other value is refused for this reason.
    Fixed(&'static str),
    /// Null is ignored, everything else is refused for this reason.
    Refused(&'static str),
}

/// One key of a section.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    pub ty: Type,
    /// YAML text of the value an absent key has; `None`: the key is required.
    pub default: Option<&'static str>,
    pub nullable: bool,
    pub class: Class,
    pub doc: &'static str,
}

impl Key {
    const fn new(name: &'static str, ty: Type, default: Option<&'static str>, doc: &'static str) -> Self {
        Self { name, ty, default, nullable: false, class: Class::Honoured, doc }
    }

    const fn class(self, class: Class) -> Self {
        Self { class, ..self }
    }

    const fn of_recipe(self) -> Self {
        self.class(Class::OfRecipe)
    }

    const fn satisfied(self, why: &'static str) -> Self {
        self.class(Class::Satisfied(why))
    }

    const fn fixed(self, why: &'static str) -> Self {
        self.class(Class::Fixed(why))
    }
}

/// A key that must be there.
const fn required(name: &'static str, ty: Type, doc: &'static str) -> Key {
    Key::new(name, ty, None, doc)
}

/// A key that may be left out.
const fn key(name: &'static str, ty: Type, default: &'static str, doc: &'static str) -> Key {
    Key::new(name, ty, Some(default), doc)
}

/// A key that may be left out or null.
const fn optional(name: &'static str, ty: Type, doc: &'static str) -> Key {
    Key { nullable: true, ..Key::new(name, ty, Some("null"), doc) }
}

const fn refused(name: &'static str, why: &'static str) -> Key {
    optional(name, Type::Any, why).class(Class::Refused(why))
}

/// One name a `_component_` may take.
#[derive(Clone, Copy, Debug)]
pub struct Component {
    pub role: Role,
    pub name: &'static str,
    /// torchtune's paths, of v0.2.1 and of v0.6.
    pub aliases: &'static [&'static str],
    pub keys: &'static [&'static [Key]],
    /// Why it cannot be used yet; `None`: it can.
    pub refused: Option<&'static str>,
    pub doc: &'static str,
}

impl Component {
    pub fn key(&self, name: &str) -> Option<&'static Key> {
        find(self.keys, name)
    }
}

/// Finds a key in the groups of a section.
pub fn find(groups: &[&'static [Key]], name: &str) -> Option<&'static Key> {
    groups.iter().flat_map(|group| group.iter()).find(|key| key.name == name)
}

/// Finds a component by its name or one of torchtune's paths.
pub fn component(name: &str) -> Option<&'static Component> {
    components::ALL.iter().find(|component| component.name == name || component.aliases.contains(&name))
}

/// Says whether a `_component_` is the file of a guest.
pub fn is_guest_path(name: &str) -> bool {
    name.ends_with(".wasm") || name.ends_with(".rhai")
}

/// Returns what somebody who wrote `name` probably meant: a name close to it, else to the end of its path. A model of a
/// family that is not built is none of another's.
pub fn similar(name: &str, role: Role) -> Option<&'static str> {
    let family = name.strip_prefix("torchtune.models.").and_then(|path| path.split('.').next());
    if role == Role::Model && family.is_some_and(|family| !model_families().any(|built| built == family)) {
        return None;
    }
    let is_usable = move |component: &&Component| component.role == role && component.refused.is_none();
    let of_role = || components::ALL.iter().filter(is_usable);
    let all = of_role().flat_map(|component| std::iter::once(&component.name).chain(component.aliases));
    suggest::nearest(name, all.copied())
        .or_else(|| suggest::nearest(last_segment(name), of_role().map(|component| component.name)))
}

/// Returns the usable components of a role.
pub fn usable(role: Role) -> impl Iterator<Item = &'static str> {
    components::ALL
        .iter()
        .filter(move |component| component.role == role && component.refused.is_none())
        .map(|component| component.name)
}

fn last_segment(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// A recipe that comes with `host`.
pub struct Recipe {
    pub name: &'static str,
    /// torchtune's names.
    pub aliases: &'static [&'static str],
    /// The name of its file, which recipes that differ in the model alone share; none for a verb of `host` itself.
    pub guest: Option<&'static str>,
    pub configs: &'static [&'static str],
    /// What it does, where no guest says it itself.
    pub doc: Option<&'static str>,
}

/// torchtune's name for the run whose model ranks share.
pub const SHARDED: &str = "lora_finetune_fsdp2";

pub const RECIPES: &[Recipe] = &[
    Recipe {
        name: "lora_distributed",
        aliases: &["lora_finetune_distributed", "lora_finetune_single_device", SHARDED],
        guest: Some("lora_distributed"),
        configs: &[
            "llama2/7B_lora",
            "llama2/7B_lora_single_device",
            "llama2/13B_lora",
            "llama2/70B_lora",
            "code_llama2/7B_lora_single_device",
            "llama3/8B_lora",
            "llama3/8B_lora_single_device",
            "llama3/70B_lora",
            "llama3_1/8B_lora",
            "llama3_1/8B_lora_single_device",
            "llama3_1/70B_lora",
            "llama3_2/1B_lora",
            "llama3_2/1B_lora_single_device",
            "llama3_2/3B_lora",
            "llama3_2/3B_lora_single_device",
            "llama3_3/70B_lora",
            "mistral/7B_lora",
            "mistral/7B_lora_single_device",
            "qwen2/0.5B_lora",
            "qwen2/0.5B_lora_single_device",
            "qwen2/1.5B_lora",
            "qwen2/1.5B_lora_single_device",
            "qwen2/7B_lora",
            "qwen2/7B_lora_single_device",
            "qwen2_5/0.5B_lora",
            "qwen2_5/0.5B_lora_single_device",
            "qwen2_5/1.5B_lora",
            "qwen2_5/1.5B_lora_single_device",
            "qwen2_5/3B_lora",
            "qwen2_5/3B_lora_single_device",
            "qwen2_5/7B_lora",
            "qwen2_5/7B_lora_single_device",
            "qwen2_5/14B_lora_single_device",
            "qwen2_5/32B_lora",
            "qwen2_5/72B_lora",
            "qwen3/0.6B_lora",
            "qwen3/0.6B_lora_single_device",
            "qwen3/1.7B_lora",
            "qwen3/1.7B_lora_single_device",
            "qwen3/4B_lora",
            "qwen3/4B_lora_single_device",
            "qwen3/8B_lora",
            "qwen3/8B_lora_single_device",
            "qwen3/14B_lora_single_device",
            "qwen3/32B_lora",
            "smollm2/135M_lora_summarize",
        ],
        doc: None,
    },
    Recipe {
        name: "full_finetune_distributed",
        aliases: &["full_finetune_single_device"],
        guest: Some("lora_distributed"),
        configs: &[
            "llama2/7B_full",
            "llama3/8B_full",
            "llama3_1/8B_full",
            "llama3_1/8B_full_single_device",
            "llama3_2/1B_full",
            "llama3_2/1B_full_single_device",
            "llama3_2/3B_full",
            "llama3_2/3B_full_single_device",
            "mistral/7B_full",
            "qwen2/0.5B_full",
            "qwen2/0.5B_full_single_device",
            "qwen2/1.5B_full",
            "qwen2/1.5B_full_single_device",
            "qwen2/7B_full",
            "qwen2/7B_full_single_device",
            "qwen2_5/0.5B_full",
            "qwen2_5/0.5B_full_single_device",
            "qwen2_5/1.5B_full",
            "qwen2_5/1.5B_full_single_device",
            "qwen2_5/3B_full",
            "qwen2_5/3B_full_single_device",
            "qwen2_5/7B_full",
            "qwen2_5/7B_full_single_device",
            "qwen3/0.6B_full",
            "qwen3/0.6B_full_single_device",
            "qwen3/1.7B_full",
            "qwen3/1.7B_full_single_device",
            "qwen3/4B_full",
            "qwen3/4B_full_single_device",
            "qwen3/8B_full",
            "qwen3/8B_full_single_device",
            "smollm2/135M_full_summarize",
        ],
        doc: Some("Full fine-tuning, on any number of ranks: all weights of the model are trained"),
    },
    Recipe {
        name: "lora_dpo_distributed",
        aliases: &["lora_dpo_single_device"],
        guest: Some("lora_dpo_distributed"),
        configs: &[
            "llama2/7B_lora_dpo",
            "llama2/7B_lora_dpo_single_device",
            "llama3_1/8B_lora_dpo",
            "llama3_1/8B_lora_dpo_single_device",
        ],
        doc: None,
    },
    Recipe {
        name: "full_dpo_distributed",
        aliases: &[],
        guest: Some("lora_dpo_distributed"),
        configs: &["llama3_1/8B_full_dpo"],
        doc: Some("DPO of all weights, on any number of ranks; the reference is a second, frozen model"),
    },
    Recipe {
        name: "knowledge_distillation_distributed",
        aliases: &["knowledge_distillation_single_device"],
        guest: Some("knowledge_distillation_distributed"),
        configs: &[
            "llama3_2/8B_to_1B_KD_lora_distributed",
            "llama3_2/8B_to_1B_KD_lora_single_device",
            "qwen2/1.5_to_0.5B_KD_lora_distributed",
            "qwen2/1.5_to_0.5B_KD_lora_single_device",
            "qwen3/14B_to_8B_KD_lora_single_device",
        ],
        doc: None,
    },
    Recipe {
        name: "generate",
        aliases: &[],
        guest: None,
        configs: &["generation", "smollm2/135M_generate"],
        doc: Some("writes a continuation of one prompt"),
    },
];

impl Recipe {
    /// Whether it is for models with adapters, or for those without; none where that is the config's matter.
    pub fn trains_adapters(&self) -> Option<bool> {
        let of = |prefix: &str| self.name.starts_with(prefix);
        (of("lora_") || of("full_")).then(|| of("lora_"))
    }

    /// The one of the same guest for the other kind of models.
    pub fn counterpart(&self) -> Option<&'static Recipe> {
        RECIPES.iter().find(|other| other.guest == self.guest && other.name != self.name)
    }
}

/// Finds a shipped recipe by name or by torchtune's name for it.
pub fn recipe(name: &str) -> Option<&'static Recipe> {
    RECIPES.iter().find(|recipe| recipe.name == name || recipe.aliases.contains(&name))
}

/// Returns the shipped recipe somebody probably meant, by a name or by the path of a file.
pub fn similar_recipe(name: &str) -> Option<&'static str> {
    let names = RECIPES.iter().flat_map(|recipe| std::iter::once(&recipe.name).chain(recipe.aliases));
    let name = file_stem(name);
    // Who leaves out how it is distributed wants ours, which comes before torchtune's names for it.
    let begins = || names.clone().copied().find(|known| name.len() > 3 && known.starts_with(name));
    suggest::nearest(name, names.clone().copied()).or_else(begins)
}

/// Returns the shipped config somebody probably meant, by a name with or without its folder, or by the path of a file.
pub fn similar_config(name: &str) -> Option<&'static str> {
    let name = name.rsplit("configs/").next().unwrap_or(name).trim_end_matches(".yaml");
    let configs = || RECIPES.iter().flat_map(|recipe| recipe.configs).copied();
    // Not `file_stem`: the names have points in them, as `0.5B`.
    let last = |name: &'static str| name.rsplit('/').next().unwrap_or(name);
    suggest::nearest(name, configs())
        .or_else(|| configs().find(|config| suggest::nearest(name, [last(config)]).is_some_and(|_| name.len() > 3)))
}

/// `name` of `folder/name.extension`.
pub fn file_stem(path: &str) -> &str {
    std::path::Path::new(path).file_stem().and_then(|stem| stem.to_str()).unwrap_or(path)
}
