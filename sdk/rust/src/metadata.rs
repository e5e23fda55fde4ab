//! What a guest says of itself: the macro that writes it into the component, where it is read without running the guest.

/// Says what this guest is, and which keys it reads of a config: TOML, which begins in the macro's own line.
///
/// ```ignore
/// host_sdk::metadata! {r#"
/// description = "Focal loss: tokens that the model is sure of count less."
/// version = "0.1.0"
///
/// [keys.gamma]
/// type = "num"
/// default = 2.0
/// min = 0.0
/// doc = "how much less; 0 is cross-entropy"
/// "#}
/// ```
///
/// Fields are `name`, `version`, `description` and `license`, all texts, and the table `keys`. A key has a `type` (`flag`,
/// `int`, `num` or `text`) and may have `default`, `min`, `max`, `choices`, `required` and `doc`. Of a guest that names keys
/// the host refuses any other in a config, and gives it all of them: of their type, by default or null where a config says
/// nothing.
#[macro_export]
macro_rules! metadata {
    ($toml:literal) => {
        const _: () = {
            // The first line tells where the others are, so that the host names the author's own file and line.
            const TEXT: &str = ::core::concat!("# ", ::core::file!(), ":", ::core::line!(), "\n", $toml);
            // A custom section of the module is bytes apart from its memory: nothing of the guest has to run.
            #[used]
            #[cfg_attr(target_family = "wasm", unsafe(link_section = "host:meta"))]
            static SECTION: [u8; TEXT.len()] = match TEXT.as_bytes().first_chunk() {
                ::core::option::Option::Some(bytes) => *bytes,
                ::core::option::Option::None => ::core::panic!(),
            };
        };
    };
}
