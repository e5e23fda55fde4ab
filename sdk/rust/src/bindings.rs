//! What `wit-bindgen` makes of the contract. Not part of the interface of this crate.
#![allow(missing_docs)]

wit_bindgen::generate!({
    path: "../wit/0.1.0",
    world: "recipe",
    export_macro_name: "export_recipe",
    default_bindings_module: "host_sdk::bindings",
    pub_export_macro: true,
});

/// The world of losses.
pub mod loss {
    wit_bindgen::generate!({
        path: "../wit/0.1.0",
        world: "loss",
        with: {
            "host:sdk/types@0.1.0": crate::bindings::host::sdk::types,
            "host:sdk/tensors@0.1.0": crate::bindings::host::sdk::tensors,
        },
        export_macro_name: "export_loss",
        default_bindings_module: "host_sdk::bindings::loss",
        pub_export_macro: true,
    });
}

/// The world of templates.
pub mod template {
    wit_bindgen::generate!({
        path: "../wit/0.1.0",
        world: "template",
        with: { "host:sdk/types@0.1.0": crate::bindings::host::sdk::types },
        export_macro_name: "export_template",
        default_bindings_module: "host_sdk::bindings::template",
        pub_export_macro: true,
    });
}
