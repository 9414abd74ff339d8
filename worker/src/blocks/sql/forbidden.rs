//! Functions that do more than compute from their arguments and the rows: they wait, lock, read files, speak to others,
//! run text as SQL, change the session or the server. And what shows others' sessions or credentials: tenants may share
//! a login.

use super::database::Engine;

/// Whether a function of this name is refused.
pub(super) fn is_forbidden(name: &str, engine: Engine) -> bool {
    let name = name.to_ascii_lowercase();
    let is_in = |list: &str| list.split_ascii_whitespace().any(|entry| entry == name);
    let has_prefix = |list: &str| list.split_ascii_whitespace().any(|prefix| name.starts_with(prefix));
    // An escape inside of a quoted name would hide what it is.
    if name.contains('\\') {
        return true;
    }
    match engine {
        Engine::Postgres if name.starts_with("pg_") => {
            !(is_in(PG_HARMLESS) || has_prefix(PG_HARMLESS_PREFIXES) || name.ends_with("_is_visible"))
        }
        Engine::Postgres => is_in(PG_FORBIDDEN) || has_prefix(PG_FORBIDDEN_PREFIXES),
        Engine::Mysql => is_in(MYSQL_FORBIDDEN) || has_prefix(MYSQL_FORBIDDEN_PREFIXES),
    }
}

/// Whether a name, wherever it stands, is of a table that shows sessions or credentials.
pub(super) fn is_hidden(name: &str, engine: Engine) -> bool {
    // As MariaDB does it for `information_schema`: there, İ is an i.
    let name = name.replace('İ', "i").to_lowercase();
    let is_in = |list: &str| list.split_ascii_whitespace().any(|entry| entry == name);
    match engine {
        Engine::Postgres => {
            let is_of_tables = PG_STAT_OF_TABLES.split_ascii_whitespace().any(|prefix| name.starts_with(prefix));
            is_in(PG_HIDDEN) || (name.starts_with("pg_stat_") && !is_of_tables)
        }
        Engine::Mysql => is_in(MYSQL_HIDDEN),
    }
}

/// Whether a schema of this name holds sessions or credentials.
pub(super) fn is_hidden_schema(name: &str, engine: Engine) -> bool {
    let is_listed = MYSQL_HIDDEN_SCHEMAS.iter().any(|schema| name.eq_ignore_ascii_case(schema));
    engine == Engine::Mysql && is_listed
}

/// Whether `SHOW` of this is allowed where our parser does not know it more precisely.
pub(super) fn may_be_shown(what: &str, engine: Engine) -> bool {
    let is_listed = MYSQL_SHOWN.iter().any(|word| what.eq_ignore_ascii_case(word));
    // PostgreSQL shows settings only.
    engine == Engine::Postgres || is_listed
}

/// Of all functions that begin with `pg_`, those that tell about the catalogue, values and sizes. Others are refused,
/// those that a later server brings too.
const PG_HARMLESS: &str = "\
    pg_available_extension_versions pg_available_extensions pg_backend_pid pg_char_to_encoding pg_client_encoding \
    pg_collation_for pg_column_compression pg_column_is_updatable pg_column_size pg_conf_load_time \
    pg_current_snapshot pg_database_size pg_describe_object pg_encoding_max_length pg_encoding_to_char \
    pg_extension_update_paths pg_has_role pg_identify_object pg_identify_object_as_address \
    pg_index_column_has_property pg_index_has_property pg_indexam_has_property pg_indexes_size pg_input_error_info \
    pg_input_is_valid pg_is_in_recovery pg_is_other_temp_schema pg_lsn pg_my_temp_schema pg_options_to_table \
    pg_partition_ancestors pg_partition_root pg_partition_tree pg_postmaster_start_time pg_relation_filenode \
    pg_relation_is_publishable pg_relation_is_updatable pg_relation_size pg_sequence_last_value \
    pg_sequence_parameters pg_settings_get_flags pg_size_bytes pg_size_pretty pg_snapshot_xip pg_snapshot_xmax \
    pg_snapshot_xmin pg_table_size pg_tablespace_databases pg_timezone_abbrevs pg_timezone_names \
    pg_total_relation_size pg_trigger_depth pg_typeof pg_visible_in_snapshot pg_wal_lsn_diff pg_xact_commit_timestamp";

const PG_HARMLESS_PREFIXES: &str = "\
    pg_get_acl pg_get_catalog_foreign_keys pg_get_constraintdef pg_get_expr pg_get_function pg_get_indexdef \
    pg_get_keywords pg_get_object_address pg_get_partition_constraintdef pg_get_partkeydef pg_get_ruledef \
    pg_get_serial_sequence pg_get_statisticsobjdef pg_get_triggerdef pg_get_userbyid pg_get_viewdef";

const PG_FORBIDDEN: &str = "\
    connectby currtid2 currval database_to_xml database_to_xml_and_xmlschema database_to_xmlschema \
    gin_clean_pending_list invoke lastval loread lowrite nextval schema_to_xml schema_to_xml_and_xmlschema \
    schema_to_xmlschema set_config setseed setval system table_import_from_s3 table_to_xml \
    table_to_xml_and_xmlschema table_to_xmlschema ts_rewrite ts_stat txid_current txid_current_if_assigned \
    xpath_table";

const PG_FORBIDDEN_PREFIXES: &str = "\
    binary_upgrade_ brin_desummarize_ brin_summarize_ crosstab cursor_to_xml dblink file_fdw_ http lo_ \
    postgres_fdw_ query_export_ query_to_xml ri_fkey_";

const MYSQL_FORBIDDEN: &str = "\
    benchmark get_lock is_free_lock is_used_lock lastval load_file master_gtid_wait master_pos_wait nextval \
    name_const release_all_locks release_lock setval sleep source_pos_wait wait_for_executed_gtid_set \
    wait_until_sql_thread_after_gtids";

const MYSQL_FORBIDDEN_PREFIXES: &str = "\
    asynchronous_connection_failover_ audit_ firewall_ group_replication_ keyring_ lib_mysqludf_ mysql_firewall_ \
    service_ sys_ spider_ version_tokens_ wsrep_";

const PG_HIDDEN: &str = "\
    _pg_user_mappings pg_authid pg_file_settings pg_hba_file_rules pg_ident_file_mappings pg_locks pg_prepared_xacts \
    pg_replication_slots pg_shadow pg_user_mapping pg_user_mappings user_mapping_options";

/// Of all views that begin with `pg_stat_`, those that count what happens to tables, indexes and databases.
const PG_STAT_OF_TABLES: &str = "pg_stat_all_ pg_stat_database pg_stat_sys_ pg_stat_user_ pg_stat_xact_";

const MYSQL_HIDDEN: &str = "\
    client_statistics innodb_lock_waits innodb_locks innodb_trx metadata_lock_info processlist query_cache_info \
    user_attributes user_statistics";

const MYSQL_HIDDEN_SCHEMAS: [&str; 3] = ["mysql", "performance_schema", "sys"];

/// The first word after `SHOW`; `TABLE` is that of `TABLE STATUS`.
const MYSQL_SHOWN: [&str; 8] = ["ENGINES", "ERRORS", "INDEX", "INDEXES", "KEYS", "TABLE", "TRIGGERS", "WARNINGS"];
